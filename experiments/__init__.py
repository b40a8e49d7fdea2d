"""What the parts of the method are worth, what a model makes of language, and how fast it is: python -m experiments.NAME."""
