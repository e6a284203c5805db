"""One run of a long job: folder, lock, record, states, tasks, pages and pictures."""
