mod observe;
