"""Numbers out: functions that take arrays of predictions, images or features and return statistics."""
