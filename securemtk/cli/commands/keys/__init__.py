"""The commands below `securemtk keys`."""
