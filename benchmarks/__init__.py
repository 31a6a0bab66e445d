"""Figures, always as ratios against a floor measured in the same run: the machine is noisy."""
