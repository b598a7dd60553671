"""One file a tool: from what it wrote to `Side`. A reader takes what is there, and names what is not."""
