"""What surrounds a run: devices, processes, the run's folder, optimisers, errors. Imports nothing of this project."""
