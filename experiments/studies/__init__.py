"""Questions that the experiments answer by measuring, a module each."""
