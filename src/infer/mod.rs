//! Using a trained model.
