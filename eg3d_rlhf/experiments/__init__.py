"""One run of a long job: folder, lock, record, states, tasks, report pages and images."""
