//! What the repository says of itself: its layers, its README, its document on soundness.

mod repository {
    mod layers;
    mod readme;
    mod soundness;
}
