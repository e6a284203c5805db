"""Evaluation of generators and rewards. Each module computes one report, or a section of the evaluation
report.
"""
