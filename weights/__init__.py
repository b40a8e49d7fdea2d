"""Weights from files and by name: published names, foundation models, checkpoints."""
