"""From records to numbers with intervals, and those as JSON, lines and pages."""
