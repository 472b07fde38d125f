"""Trained networks as files that run without their code."""
