"""What samples say: moments, entropies, calibration."""
