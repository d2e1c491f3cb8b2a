"""What was measured: tables of operating points, of which network they are, their pictures and their files."""
