"""Suites of questions: bundled scenes, local files, tasks of lmms-eval."""
