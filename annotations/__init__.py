"""Referring data sets on disk: layouts, masks, checks."""
