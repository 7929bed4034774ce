"""Random calls of the ops, judged by the oracle: `PYTHONPATH=python_tests python -m fuzz --seconds 60`."""
