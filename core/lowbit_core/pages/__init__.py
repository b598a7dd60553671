"""Pages in one look: charts as specifications, tables beside them, and the document around both."""
