"""Measuring foveal against its peers: behind `python -m foveal bench` and the project's own bench/report.py."""
