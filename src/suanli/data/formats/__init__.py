"""Files of annotations that lie beside images: one format a file."""
