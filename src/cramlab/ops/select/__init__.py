"""Selecting some tokens of each sequence, gathering their entries and scattering them back."""
