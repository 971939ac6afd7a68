"""The architectural sculptor: finds what no longer pays and proposes to carve it away; Tolaria executes."""
