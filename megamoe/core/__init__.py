"""The ground floor, without torch: errors, exit statuses, paths of a run, files, redaction, child processes."""
