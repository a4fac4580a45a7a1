//! A package of its own, so that the bench `packet` is built without what the others need.
