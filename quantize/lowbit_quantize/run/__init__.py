"""What a run leaves on the disk: its directory, the journal that a killed run goes on from, whole files."""
