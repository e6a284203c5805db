"""Tests of the judge: a fake chat-completions server in a process of its own stands in for a model."""
