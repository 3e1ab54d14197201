"""What reads finished runs: tables, plots, one page. No torch, no timm, no datasets here."""
