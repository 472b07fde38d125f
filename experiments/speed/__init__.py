"""Measures the region convolution, the layer and a network against what they replace."""
