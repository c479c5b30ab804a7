"""Methods that add directions to a frozen matrix: W + ΔW."""
