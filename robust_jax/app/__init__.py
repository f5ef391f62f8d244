"""The application that launch.py runs: configs, runs in their folders, reports, studies."""
