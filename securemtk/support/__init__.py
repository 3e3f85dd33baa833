"""Small things that all of securemtk uses: files, cores, values that travel."""
