"""Work folders (WORK), which contain all steps with one flow generator: plan, samples, answers, tuning and
study.
"""
