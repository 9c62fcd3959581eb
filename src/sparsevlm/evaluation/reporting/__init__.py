"""Results from stored predictions, as tables, CSV rows and plots."""
