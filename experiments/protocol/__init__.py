"""The paper's section 5: draw, train the experts, learn coefficients, blend, fine-tune."""
