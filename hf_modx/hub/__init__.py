"""The Hub: a revision of one repository for each phase of a run, and streams as data sets."""
