"""What the report is made of: the files it reads, what it says about them, its charts."""
