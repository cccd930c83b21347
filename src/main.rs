//! The command `carrousel`.

fn main() -> std::process::ExitCode {
    carrousel::cli::main()
}
