"""Blind studies in which people compare two generators: design, pages, analysis and report."""
