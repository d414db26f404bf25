"""The paper's experiments: everything that knows a data set, a network, a file or a plot."""
