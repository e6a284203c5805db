"""Circular-DPO: preferences on finished assets fed back from stage to stage, its command line, and its
ablation.
"""
