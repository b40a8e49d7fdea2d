"""What surrounds a run: devices, processes, the run's folder, averaged weights, errors. Imports nothing of this project."""
