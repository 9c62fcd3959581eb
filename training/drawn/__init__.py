"""Drawn tasks of any size to learn from: chats packed one behind the other, made by processes beside the run."""
