"""Benchmark scripts, their stored rows, and the tables and plots made from these."""
