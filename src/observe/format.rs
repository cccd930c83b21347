//! Numbers as people read them: on the console, in the table, beside the axes.

/// `12345` as `12,345`.
pub fn count(n: u64) -> String {
    let digits = n.to_string();
    let mut text = String::with_capacity(digits.len() + digits.len() / 3);
    for (i, digit) in digits.chars().enumerate() {
        if i > 0 && (digits.len() - i).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

/// A number with about `digits` significant digits: `1.623`, `412.1`, `3.1e-7`; `nan`, `inf`.
pub fn number(x: f64, digits: usize) -> String {
    if x.is_nan() {
        return "nan".into();
    }
    if x.is_infinite() {
        return if x > 0.0 { "inf".into() } else { "-inf".into() };
    }
    if x == 0.0 {
        return "0".into();
    }
    // Rounded first: 0.9997 in three digits is 1.00, of another magnitude.
    let scientific = format!("{x:.*e}", digits.max(1) - 1);
    let magnitude: i64 = scientific.split_once('e').and_then(|(_, exponent)| exponent.parse().ok()).unwrap_or(0);
    if !(-4..=7).contains(&magnitude) {
        return scientific;
    }
    let decimals = (digits.max(1) as i64 - 1 - magnitude).max(0) as usize;
    format!("{x:.decimals$}")
}

/// As [`number`], without trailing zeros: `1.5`, `0.006`.
pub fn trimmed(x: f64, digits: usize) -> String {
    let text = number(x, digits);
    let (mantissa, exponent) = text.split_at(text.find('e').unwrap_or(text.len()));
    let mantissa = if mantissa.contains('.') { mantissa.trim_end_matches('0').trim_end_matches('.') } else { mantissa };
    format!("{mantissa}{exponent}")
}

/// A setting such as a learning rate, in at most three significant digits: `0.002`, `1.5e-5`.
pub fn setting(x: f64) -> String {
    trimmed(x, 3)
}

/// A rate with a thousands letter: `812`, `41.2k`, `3.05M`.
pub fn rate(x: f64) -> String {
    if !x.is_finite() || x < 0.0 {
        return "-".into();
    }
    // The borders lie where the rounding would give 1000 of the smaller unit.
    for (unit, letter) in [(1e9, "G"), (1e6, "M"), (1e3, "k")] {
        if x >= 0.9995 * unit {
            return format!("{}{letter}", number(x / unit, 3));
        }
    }
    if x < 10.0 { number(x, 2) } else { format!("{x:.0}") }
}

/// Bytes with a binary unit: `812 B`, `4.00 MiB`.
pub fn bytes(n: u64) -> String {
    let mut size = n as f64;
    let mut unit = "B";
    for next in ["KiB", "MiB", "GiB", "TiB"] {
        if size < 1024.0 {
            break;
        }
        size /= 1024.0;
        unit = next;
    }
    if unit == "B" { format!("{n} B") } else { format!("{size:.2} {unit}") }
}

/// A span of time: `0.42 s`, `12.3 s`, `2 min 10 s`, `3 h 05 min`, `2 d 04 h`.
pub fn duration(seconds: f64) -> String {
    if !seconds.is_finite() || seconds < 0.0 {
        return "-".into();
    }
    if seconds < 9.995 {
        return format!("{seconds:.2} s");
    }
    if seconds < 59.95 {
        return format!("{seconds:.1} s");
    }
    let whole = seconds.round() as u64;
    match whole {
        0..3_600 => format!("{} min {:02} s", whole / 60, whole % 60),
        3_600..86_400 => format!("{} h {:02} min", whole / 3_600, whole % 3_600 / 60),
        _ => format!("{} d {:02} h", whole / 86_400, whole % 86_400 / 3_600),
    }
}
