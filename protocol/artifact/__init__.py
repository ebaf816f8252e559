"""What an artifact is: parameters, graphs and where they are cut, as its manifest says it."""
