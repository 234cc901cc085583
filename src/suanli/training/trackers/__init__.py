"""Optional writers of metrics: one a file, each exporting TRACKER."""
