//! The built-in HTTP worker of `dispatcher demo`.

/// Serves until the dispatcher that started this process goes away.
///
/// # Errors
/// When it cannot join. PLACEHOLDER: always, until the worker is written with the SDK's axum layer.
pub fn worker() -> Result<(), String> {
    Err("the demo's worker is not part of this build yet".to_owned())
}
