"""Bridges to other projects' plugin systems; each is loaded by its host only."""
