"""Optional experiment trackers: one a file, each exporting TRACKER."""
