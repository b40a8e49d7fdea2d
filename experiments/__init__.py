"""Studies of the method: ablation, language, probes, speed. Run as python -m experiments.NAME."""
