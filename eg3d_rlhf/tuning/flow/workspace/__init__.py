"""The folder WORK: plan, sample, answers, tuning, study and status of one flow generator."""
