//! What the repository says of itself: its dependencies, layers and names, its README, its document on
//! soundness.

mod repository {
    mod dependencies;
    mod engines;
    mod fuzzing;
    mod layers;
    mod licences;
    mod names;
    mod package;
    mod readme;
    mod soundness;
    mod versions;
}
